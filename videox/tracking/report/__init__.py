"""report.html: one self-contained page on a run, made from the files of its output_dir; imports no torch at start."""
