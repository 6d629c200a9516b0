"""CrossKD training of compact detectors; torch and mmdet live here."""
