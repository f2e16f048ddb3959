"""Results for other programs: CSV, data frames and Parquet, experiment trackers."""
