"""Writer of LeRobot v3 data sets from demonstrations of any readable format."""
