"""Pages about the patches of photos, for report.py and explore.py: figures, charts, pictures and HTML."""
