"""Serves whoever keeps a --latent_cache: what is in it, whether it is whole, and how it is made smaller.

python scripts/cache.py list CACHE
python scripts/cache.py verify CACHE
python scripts/cache.py gc CACHE [--data_dir DIR] [--drop_encoder FINGERPRINT ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from videox.data.cache.maintenance import clean, contents, files_of, is_cache, shard_paths, size_text, verify
from videox.errors import STORAGE, UserError
from videox.run.lifecycle import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command and its flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, said in (
        ("list", "entries and bytes by part and encoder"),
        ("verify", "reads every entry; exits 5 if one is damaged"),
        ("gc", "drops damaged entries, second copies and unfinished files, and gathers small files into large ones"),
    ):
        command = commands.add_parser(name, help=said, description=said)
        command.add_argument("cache", type=Path, help="folder given as --latent_cache")
        if name == "gc":
            command.add_argument(
                "--data_dir", type=Path, help="drop what was made of files below it that changed or went"
            )
            command.add_argument(
                "--drop_encoder", nargs="+", default=[], help="drop what these encoders made (see list)"
            )
    return parser.parse_args(argv)


def clear_up(folder: Path, encoders: Sequence[str], data_dir: Path | None) -> dict[str, int]:
    """Runs gc; returns how many entries went, by reason. Raises UserError."""
    if data_dir is not None and not data_dir.is_dir():
        raise UserError("--data_dir", f"{data_dir} is not a folder", "give the --train_data_dir of your runs", STORAGE)
    files = files_of(folder) if data_dir is not None else set()
    if data_dir is not None and files and not any((data_dir / file).exists() for file in files):
        what = f"{data_dir} has none of the {len(files):,} files that the cache was made of, such as {min(files)}"
        hint = "give the --train_data_dir of your runs, mounted; to drop all of a cache delete its folder"
        raise UserError("--data_dir", what, hint, STORAGE)
    unknown = set(encoders) - {kind[1] for kind in contents(folder)}
    if unknown:
        what = f"nothing here was made by {', '.join(sorted(unknown))}"
        raise UserError("--drop_encoder", what, "give fingerprints that `list` shows, whole")
    try:
        return clean(folder, encoders=encoders, data_dir=data_dir)
    except OSError as why:
        hint = "make room or make it writable; what the cache holds stands"
        raise UserError(str(folder), f"cannot be cleared up ({why})", hint, STORAGE) from why


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parse_args(argv)
    if not args.cache.is_dir():
        raise UserError(str(args.cache), "is not a folder", "give the folder that --latent_cache names", STORAGE)
    if not is_cache(args.cache):
        raise UserError(
            str(args.cache), "holds nothing of a cache", "give the folder that --latent_cache names", STORAGE
        )
    if args.command == "list":
        found = contents(args.cache)
        for part, encoder, entries, size in found:
            print(f"{part:<14} {encoder} {entries:>9,} entries {size_text(size):>12}")
        whole = size_text(sum(kind[3] for kind in found))
        print(f"{sum(kind[2] for kind in found):,} entries, {whole}, in {len(shard_paths(args.cache))} files")
    elif args.command == "verify":
        whole, faults = verify(args.cache)
        hint = ["what is damaged is made anew when a run needs it; scripts/cache.py gc drops it"] if faults else []
        print("\n".join([*faults, f"{whole:,} entries are whole, {len(faults):,} faults", *hint]))
        return STORAGE if faults else 0
    else:
        dropped = clear_up(args.cache, args.drop_encoder, args.data_dir)
        print("\n".join(f"dropped: {count} ({reason})" for reason, count in dropped.items()) or "nothing to drop")
    return 0


if __name__ == "__main__":
    run_script(main)
