"""Programs over regions: the demo, one region from end to end, and the study."""
