"""Programs for maintainers. The Makefile runs them."""
