#!/usr/bin/env python3
"""A reader written from docs/telemetry.md alone; prints what `hybridmoe-log export RUN --csv --metric NAME ...` does.
Usage: tools/read_log.py RUN [METRIC ...]   (default: every scalar). Stops at the first record that is not whole."""
import functools, glob, itertools, struct, sys

TABLE = [functools.reduce(lambda c, _: c >> 1 ^ (0x82F63B78 if c & 1 else 0), range(8), byte) for byte in range(256)]
def masked_crc(data):
    crc = 0xFFFFFFFF ^ functools.reduce(lambda c, byte: c >> 8 ^ TABLE[(c ^ byte) & 255], data, 0xFFFFFFFF)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
def records(path):
    with open(path, "rb") as file: data, at = file.read(), 0
    while at + 16 <= len(data):
        length, length_crc = struct.unpack_from("<QI", data, at)
        payload = data[at + 12:at + 12 + length]
        whole = masked_crc(data[at:at + 8]) == length_crc and at + 16 + length <= len(data)
        if not whole or struct.unpack_from("<I", data, at + 12 + length)[0] != masked_crc(payload): break
        yield fields(payload)
        at += 16 + length
def varints(data, at=0):  # yields (value, place behind it)
    value = shift = 0
    for place in range(at, len(data)):
        value, shift = value | (data[place] & 127) << shift, shift + 7
        if data[place] < 128:
            yield value, place + 1
            value = shift = 0
def fields(data):  # of a protobuf message: number -> its values, integers or bytes
    found, at = {}, 0
    while at < len(data):
        key, at = next(varints(data, at))
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 2: size, at = next(varints(data, at))
        value, at = next(varints(data, at)) if key & 7 == 0 else (data[at:at + size], at + size)
        found.setdefault(key >> 3, []).append(value)
    return found
def metrics_of(header):  # name -> (storage, column, labels of the elements)
    axes = [[fields(e).get(1, [b""])[0].decode() for e in fields(axis).get(2, [])] for axis in header.get(13, [])]
    for metric in map(fields, header.get(14, [])):
        own = [axes[i] for packed in metric.get(7, []) for i, _ in varints(packed)]
        labels = ["/".join(label) for label in itertools.product(*own)]
        yield metric[1][0].decode(), (metric.get(4, [0])[0], metric.get(6, [0])[0], labels)

missing = lambda x, storage: storage == 0 and struct.pack("<d", x) == struct.pack("<Q", 0x7FF8000000000000)
text = lambda x: "nan" if x != x else "%.9g" % x if float("%.9g" % x) == x else "%.17g" % x
paths = sorted(glob.glob(sys.argv[1] + "/telemetry/attempt-*.tfrecord"))
logs = [(fields(log[0][1][0]), log) for log in map(list, map(records, paths)) if log]
headers = {header.get(3, [0])[0]: header for header, _ in logs}
metrics = dict(metrics_of(headers[max(headers)]))
names = sys.argv[2:] or [name for name in metrics if metrics[name][0] == 0]
print(",".join(["step,attempt,wall_time"] + [n + (l and "/" + l) for n in names for l in metrics[n][2]]))
for header, log in logs:
    attempt, own = header.get(3, [0])[0], dict(metrics_of(header))
    until = min([h[5][0] for a, h in headers.items() if a > attempt], default=1 << 62)
    for step in (step for r in log if 2 in r for step in [fields(r[2][0])] if step[1][0] < until):
        arrays = [[x for p in step.get(f, []) for x, in struct.iter_unpack(c, p)] for f, c in ((3, "<d"), (4, "<f"))]
        arrays.append([x for p in step.get(5, []) for x, _ in varints(p)])
        cells = [str(step[1][0]), str(attempt), "%.3f" % struct.unpack("<d", step[2][0])[0]]
        for storage, column, labels in (own.get(name, (0, 1 << 30, metrics[name][2])) for name in names):
            found = arrays[storage][column:column + len(labels)]  # none where the dense arrays were dropped
            cells += ["" if missing(x, storage) else text(x) for x in found] + [""] * (len(labels) - len(found))
        print(",".join(cells))
