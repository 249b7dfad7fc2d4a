"""Check that a wheel has the whole package, and can be imported without any other package: check_wheel.py WHEEL."""

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = Path("idempotency")
PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import idempotency
for name in idempotency.__all__:
    getattr(idempotency, name)
"""

wheel = sys.argv[1]
expected = {path.as_posix() for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
with zipfile.ZipFile(wheel) as archive:
    shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
if expected ^ shipped:
    sys.exit(f"the wheel and the source differ: {sorted(expected ^ shipped)}")
if "idempotency/py.typed" not in shipped:
    sys.exit("the wheel has no py.typed")

# -S leaves out site-packages, so that an extra imported by accident is missing here.
sys.exit(subprocess.run([sys.executable, "-I", "-S", "-c", PROBE, wheel], check=False).returncode)
