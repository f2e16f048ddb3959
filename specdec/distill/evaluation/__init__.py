"""Measurements of a draft: acceptance, calibration, convention, costs and the best tree."""
