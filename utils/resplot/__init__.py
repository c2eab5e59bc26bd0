"""The door of the viewer, python -m utils.resplot; its room is viewer/."""
