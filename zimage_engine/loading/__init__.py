"""From a path or an id to a stock diffusers pipeline that was checked."""
