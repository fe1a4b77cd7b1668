"""The engine alone, measured."""
