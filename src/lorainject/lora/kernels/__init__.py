"""Every special case for speed, behind one door."""
