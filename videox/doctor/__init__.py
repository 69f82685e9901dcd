"""The program `python -m videox.doctor`: what of this machine will not work. Needs the standard library only."""
