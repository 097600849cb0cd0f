"""Laws, oracles and planted bugs, for our tests and for users' own parts."""
