"""The tests; a package so that Ray's workers can import functions that are defined in them."""
