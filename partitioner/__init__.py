"""Offline: fetch a model, export its draft, write and check a bundle."""
