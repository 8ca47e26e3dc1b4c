"""Memory while a large shard is spooled and published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, resource, sys
import pyarrow as pa
from fourdh_batch.storage import Store
from fourdh_batch.tables.writer import SavedSpool, WorkSpool
from tests.table_rows import publish, tracks_table, videos_table

root, num_rows = sys.argv[1], int(sys.argv[2])
store = Store(root)
step = 500
spool = WorkSpool(store, "s1")
spool.begin("a")
rows = tracks_table("a", step)
index = rows.schema.get_field_index("frame_index")
field = rows.schema.field(index)
frames = rows.column(index).to_numpy()
for first in range(0, num_rows // 2, step):
    spool.append("tracks", rows.set_column(index, field, pa.array(frames + first)))
spool.append("videos", videos_table("a"))
spool.finish({"track_len": {"1": num_rows // 2, "2": num_rows // 2}})
spool.save()
record = publish(store, [SavedSpool(store, "s1", spool.name)])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"rows": record.num_rows["tracks"], "peak": peak}))
"""


def peak_bytes(root: Path, num_rows: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(root), str(num_rows)],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        cwd=Path(__file__).resolve().parents[2],
    )
    result = json.loads(done.stdout)
    assert result["rows"] == num_rows
    return int(result["peak"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_of_a_shard(tmp_path: Path) -> None:
    small = peak_bytes(tmp_path / "small", 10_000)
    large = peak_bytes(tmp_path / "large", 300_000)  # 0.6 GB in memory
    assert large < small + 64 * 2**20, (small, large)
