"""Ground: native code, dispatch, checks, files, what is printed."""
