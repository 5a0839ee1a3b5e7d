"""The page at `/`: a front's page (fronts/page/) that also asks the model, at two preferences side by side."""
