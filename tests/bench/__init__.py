"""Tests of the bench: its loop, checks, reports and views, without a GPU."""
