#!/usr/bin/env bash
# Runs a command beside a real object store: Ceph's RADOS Gateway with one monitor and one OSD that
# keeps its data in memory, on loopback, in a folder that is gone afterwards. Without a command it
# runs the tests that speak S3. The command finds the endpoint in FOURDH_TEST_S3.
#
#   infra/test_s3.sh
#   infra/test_s3.sh .venv/bin/python -m tests.benchmark remote_reading
set -euo pipefail

PACKAGES="radosgw ceph-mon ceph-osd ceph-common"
KEY=test SECRET=testtest
cd "$(dirname "$0")/.."

missing=$(for program in ceph-mon ceph-osd radosgw radosgw-admin ceph curl; do
    command -v "$program" > /dev/null || echo "$program"
done)
if [ -n "$missing" ]; then
    echo "cannot test against Ceph, not installed:" $missing >&2
    echo "on Debian or Ubuntu: apt-get install --no-install-recommends $PACKAGES curl" >&2
    exit 1
fi

if [ $# -eq 0 ]; then
    set -- "${PYTHON:-.venv/bin/python}" -m pytest -m "slow or not slow" \
        tests/unit/test_storage_s3.py tests/unit/test_verify_s3.py \
        tests/fault/test_storage_faults.py tests/fault/test_outages.py \
        tests/integration/test_job_s3.py
fi

home=$(mktemp -d)
stop() {
    status=$?
    trap - EXIT INT TERM
    if [ $status -ne 0 ] && [ -z "${ready:-}" ]; then
        tail -n 20 "$home"/*.log >&2 || true
    fi
    kill $(cat "$home"/*.pid 2> /dev/null) 2> /dev/null || true
    for _ in $(seq 100); do
        kill -0 $(cat "$home"/*.pid 2> /dev/null) 2> /dev/null || break
        sleep 0.1
    done
    rm -rf "$home"
    exit $status
}
trap stop EXIT
trap 'exit 130' INT TERM

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
mon_port=$(free_port)
s3_port=$(free_port)

# One replica on one disk; no authentication among daemons that only loopback reaches, which needs
# plain checksums on every messenger too, since the default mode is encrypted.
cat > "$home/ceph.conf" << EOF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$mon_port]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
$(for who in cluster service client; do echo "auth $who required = none"; done)
$(for link in cluster service client; do echo "ms $link mode = crc"; done)
$(for link in cluster service client; do echo "ms mon $link mode = crc"; done)
osd objectstore = memstore
memstore device bytes = 3G
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
mon allow pool size one = true
mon data avail crit = 1
run dir = $home
log file = $home/\$name.log
pid file = $home/\$name.pid
admin socket = $home/\$name.asok
mon data = $home/mon
osd data = $home/osd
rgw data = $home/rgw
rgw frontends = beast endpoint=127.0.0.1:$s3_port
rgw run sync thread = false
rgw enable usage log = false
rgw enable quota threads = false
EOF
export CEPH_CONF=$home/ceph.conf

wait_for() {
    what=$1
    shift
    deadline=$((SECONDS + 60))
    while [ $SECONDS -lt $deadline ]; do
        if timeout 10 "$@" > /dev/null 2>&1; then return; fi
        sleep 0.2
    done
    echo "the $what did not come up within a minute" >&2
    return 1
}

mkdir "$home/mon" "$home/osd" "$home/rgw"
fsid=$(ceph-conf --name mon.one fsid)
monmaptool --create --fsid "$fsid" --addv one "[v2:127.0.0.1:$mon_port]" "$home/monmap" > /dev/null
ceph-mon --id one --mkfs --monmap "$home/monmap" 2>> "$home/start.log"
ceph-mon --id one
osd=$(cat /proc/sys/kernel/random/uuid)
wait_for "monitor" ceph osd new "$osd" 0
ceph-osd --id 0 --mkfs --osd-uuid "$osd" 2>> "$home/start.log"
ceph-osd --id 0 >> "$home/start.log" 2>&1
wait_for "OSD" sh -c 'ceph osd stat | grep -q "1 up"'
radosgw --name client.rgw.one
wait_for "gateway" curl --silent --fail "http://127.0.0.1:$s3_port/"
radosgw-admin --name client.rgw.one user create --uid=test --display-name=test \
    --access-key=$KEY --secret-key=$SECRET > /dev/null 2>> "$home/start.log"
ready=yes
echo "$(radosgw --version | cut -d' ' -f1-3), up after $SECONDS s" >&2

export FOURDH_TEST_S3=http://127.0.0.1:$s3_port
# The tests set the key and the secret; these are for other commands.
export AWS_ENDPOINT_URL=$FOURDH_TEST_S3 AWS_ACCESS_KEY_ID=$KEY AWS_SECRET_ACCESS_KEY=$SECRET
export AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
"$@"
