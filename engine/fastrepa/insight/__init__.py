"""Commands that explain: doctor, plan, profile."""
