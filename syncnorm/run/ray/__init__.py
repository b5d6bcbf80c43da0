"""Training and verification on a Ray cluster; see the map in `syncnorm.run`."""
