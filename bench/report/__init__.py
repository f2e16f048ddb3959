"""Reports of measured runs: terminal tables, charts, an HTML page, Markdown and CSV."""
