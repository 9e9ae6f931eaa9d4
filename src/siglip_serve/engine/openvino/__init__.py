"""Towers run by OpenVINO on CPUs."""
