"""The pictures that were drawn on the page: files with an index, bounded, each owner's own."""
