"""A log of single runs, written as they come, from which a record is made: a cut call loses one run at most."""

import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from minigated.errors import InputError
from minigated.records import commit, file_hashes, hardware, software

# These work out rows and claims when the record is written; what they say then is theirs, whatever made the runs.
TABLES = ("late_gate_table", "learning_rate_table", "length_table", "moe_table")
WORKED_OUT = tuple(f"minigated/experiments/{name}.py" for name in TABLES)


class RunLog:
    """One JSON line a run in `<folder>/logs/<record id>.jsonl`.

    Lines belong together if they were made under the same settings; others stay in the file and are not used.

    Args:
        folder: where the record goes too. record_id: names the file.
        settings: everything that all runs share, JSON-able.
        files: package files that make the numbers; their hashes go into each line.
        resume: use what is there; otherwise a log with runs under the same settings is refused.
        made_only: make no run that is not there; runs may come from several machines, their lines put together.
        same_files: use only runs of the files as they are; `others` counts those that are left in the file.

    Raises:
        InputError: a folder that cannot be used; runs that are there without `resume`, or none with `made_only`.
    """

    def __init__(
        self, folder: Path, record_id: str, settings: dict, files: list[str], resume: bool, made_only: bool = False,
        same_files: bool = False,
    ):  # fmt: skip
        self.path = Path(folder) / "logs" / f"{record_id}.jsonl"
        self.settings = json.loads(json.dumps(settings))
        self.digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        self.files, self.made_only = files, made_only
        self.runs: list[dict] = []
        self.others = 0
        current = file_hashes(files) if same_files else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        except OSError as error:
            raise InputError(f"cannot use {self.path}: {error.strerror}; choose another folder with --out") from error
        for line in lines:
            try:
                run = json.loads(line)
            except json.JSONDecodeError:  # the line a cut run was writing
                continue
            if run["digest"] == self.digest:
                if current in (None, run["files"]):
                    self.runs.append(run)
                else:
                    self.others += 1
        if made_only and not self.runs:
            raise InputError(f"{self.path} holds no runs with these settings; leave --made-only out to make them")
        if self.runs and not (resume or made_only):
            raise InputError(
                f"{self.path} already holds {len(self.runs)} runs with these settings; "
                f"add --resume to go on from them, or choose another folder with --out"
            )

    def find(self, **key) -> dict | None:
        """The run with this key, if it was made."""
        return next((run for run in self.runs if run["key"] == key), None)

    def get(self, make: Callable[[], dict], **key) -> dict | None:
        """The run with this key: from the log, or made now and written; None if none may be made."""
        run = self.find(**key)
        if run is None and not self.made_only:
            run = {
                "key": key,
                "digest": self.digest,
                "result": make(),
                "hardware": hardware(),
                "software": software(),
                "commit": commit(),
                "files": file_hashes(self.files),
                "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(run, allow_nan=False) + "\n")
            self.runs.append(run)
        return run

    def provenance(self) -> str:
        """A sentence for the record's note when the runs were not all made by the same files or device."""
        made_by = [{name: code for name, code in run["files"].items() if name not in WORKED_OUT} for run in self.runs]
        files = {json.dumps(names, sort_keys=True) for names in made_by}
        devices = sorted({run["hardware"]["device"] for run in self.runs})
        days = sorted({run["utc"][:10] for run in self.runs})
        text = []
        if len(files) > 1:
            text.append(f"Runs were made by {len(files)} versions of the package files.")
        if len(devices) > 1 or len(days) > 1:
            text.append(f"Runs were made on {', '.join(devices)} on {', '.join(days)}.")
        return " ".join(text)

    def as_made(self, record: dict) -> dict:
        """The record with device, versions, code and time of the runs, not of the moment it is written."""
        last = self.runs[-1]
        record["hardware"], record["software"], record["utc"] = last["hardware"], last["software"], last["utc"]
        now = file_hashes([name for name in last["files"] if name in WORKED_OUT])
        record["code"] = {"commit": last["commit"], "files": last["files"] | now}
        return record
