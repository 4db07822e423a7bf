"""Rewards: judges of finished samples."""
