"""Reports: compare methods, run folders, pages."""
