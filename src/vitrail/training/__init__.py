"""Training: one visible loop, exact resume, and what it needs."""
