"""Writer of LeRobot v3 data sets from demonstrations of any format that is read."""
