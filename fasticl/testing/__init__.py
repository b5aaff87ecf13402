"""For contributors: proving GPU code where there is no GPU. Needs a checkout; nothing that multiplies imports it."""
