"""Scripts that print a table and write a JSON file. A package, so that no other hides it."""
