"""Commands that explain: doctor."""
