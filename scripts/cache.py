"""List, verify or clean up a --latent_cache.

python scripts/cache.py list CACHE
python scripts/cache.py verify CACHE
python scripts/cache.py gc CACHE [--data_dir DIR] [--drop_encoder FINGERPRINT ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from videox.data.cache.maintenance import (
    clean,
    format_size,
    is_cache,
    media_files,
    shard_paths,
    summarize,
    verify,
)
from videox.errors import STORAGE, UserError, plural
from videox.run.lifecycle import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command and its flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in (
        ("list", "print the number of entries and bytes per tensor and encoder"),
        ("verify", "read every entry and print the corrupted ones; exit code 5 if there are any"),
        ("gc", "drop corrupted entries, duplicates and unfinished files, and merge small shards into large ones"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("cache", type=Path, help="folder that --latent_cache names")
        if name == "gc":
            command.add_argument(
                "--data_dir", type=Path, help="also drop entries of media files below it that changed or are missing"
            )
            command.add_argument(
                "--drop_encoder",
                nargs="+",
                default=[],
                help="also drop the entries of these encoders (fingerprints that `list` prints)",
            )
    return parser.parse_args(argv)


def collect_garbage(folder: Path, encoders: Sequence[str], data_dir: Path | None) -> dict[str, int]:
    """Run gc; return the number of dropped entries by reason. Raises UserError."""
    if data_dir is not None and not data_dir.is_dir():
        hint = "pass the --train_data_dir of your runs"
        raise UserError("--data_dir", f"{data_dir} is not a folder", hint, STORAGE)
    # A data folder that is not mounted would make every entry look outdated.
    files = media_files(folder) if data_dir is not None else set()
    if data_dir is not None and files and not any((data_dir / file).exists() for file in files):
        what = f"{data_dir} contains none of the {len(files):,} media {plural(len(files), 'file')} of the cache, such as {min(files)}"
        hint = "pass the --train_data_dir of your runs, mounted; to drop the whole cache delete its folder"
        raise UserError("--data_dir", what, hint, STORAGE)
    unknown = set(encoders) - {encoder for _, encoder, _, _ in summarize(folder)}
    if unknown:
        what = f"the cache has no entries of {', '.join(sorted(unknown))}"
        raise UserError("--drop_encoder", what, "pass complete fingerprints, as `list` prints them")
    try:
        return clean(folder, encoders=encoders, data_dir=data_dir)
    except OSError as why:
        hint = "free disk space or make the folder writable; no entry is lost"
        raise UserError(str(folder), f"cannot be cleaned up ({why})", hint, STORAGE) from why


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    args = parse_args(argv)
    hint = "pass the folder that --latent_cache names"
    if not args.cache.is_dir():
        raise UserError(str(args.cache), "is not a folder", hint, STORAGE)
    if not is_cache(args.cache):
        raise UserError(str(args.cache), "contains no cache", hint, STORAGE)
    if args.command == "list":
        rows = summarize(args.cache)
        for name, encoder, entries, size in rows:
            print(f"{name:<14} {encoder} {entries:>9,} entries {format_size(size):>12}")
        entries, size = sum(row[2] for row in rows), format_size(sum(row[3] for row in rows))
        files = len(shard_paths(args.cache))
        print(f"{entries:,} {plural(entries, 'entry', 'entries')}, {size}, in {files} {plural(files, 'file')}")
    elif args.command == "verify":
        intact, errors = verify(args.cache)
        lines = [
            *errors,
            f"{intact:,} {plural(intact, 'entry is', 'entries are')} intact, {len(errors):,} {plural(len(errors), 'error')}",
        ]
        if errors:
            lines.append("corrupted entries are encoded again when a run needs them; scripts/cache.py gc drops them")
        print("\n".join(lines))
        return STORAGE if errors else 0
    else:
        dropped = collect_garbage(args.cache, args.drop_encoder, args.data_dir)
        print("\n".join(f"dropped: {count} ({reason})" for reason, count in dropped.items()) or "nothing to drop")
    return 0


if __name__ == "__main__":
    run_script(main)
