"""What needs a GPU: the measuring suite (`make bench-gpu`) and the tests that are skipped without CUDA."""
