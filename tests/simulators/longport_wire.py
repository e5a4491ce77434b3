"""LongPort's socket protocol, the server's half: WebSocket frames, binary packets, protobuf bodies.

Facts: the SDK's own client (longbridge/openapi, tag 3.0.18, rust/crates/wsclient/src/codec.rs and
client.rs) and the message definitions (longbridge/openapi-protobufs, control/, quote/, trade/).
Only what a gateway asks for is here.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

# --- protobuf ---------------------------------------------------------------------------------
Scalar = str | bytes | int
Fields = Iterable[tuple[int, Scalar]]


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(fields: Fields) -> bytes:
    """A protobuf message from (field number, value); a repeated field is given repeatedly."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(out)


def fields_of(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message with varints and byte strings only."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, data[place : place + size]
            place += size
        else:
            raise ValueError(f"wire type {key & 7} is not used by these messages")


def texts(data: bytes, number: int) -> list[str]:
    """The values of a (repeated) string field."""
    return [
        value.decode()
        for found, value in fields_of(data)
        if found == number and isinstance(value, bytes)
    ]


def text(data: bytes, number: int) -> str:
    return next(iter(texts(data, number)), "")


# --- packets ----------------------------------------------------------------------------------
REQUEST, RESPONSE, PUSH = 1, 2, 3


def read_request(packet: bytes) -> tuple[int, int, bytes]:
    """Command, request id and body of a request packet."""
    kind, command, request_id, _timeout = struct.unpack_from(">BBIH", packet)
    if kind & 0x0F != REQUEST:
        raise ValueError(f"packet type {kind & 0x0F} from a client")
    size = int.from_bytes(packet[8:11], "big")
    return command, request_id, packet[11 : 11 + size]


def response(command: int, request_id: int, body: bytes, status: int = 0) -> bytes:
    head = struct.pack(">BBIB", RESPONSE, command, request_id, status)
    return head + len(body).to_bytes(3, "big") + body


def push(command: int, body: bytes) -> bytes:
    return struct.pack(">BB", PUSH, command) + len(body).to_bytes(3, "big") + body


# --- WebSocket --------------------------------------------------------------------------------
BINARY, CLOSE, PING, PONG = 2, 8, 9, 10


def accept_key(key: str) -> str:
    """The `Sec-WebSocket-Accept` to a client's key (RFC 6455, 4.2.2)."""
    digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return base64.b64encode(digest).decode()


def send_frame(connection: socket.socket, opcode: int, payload: bytes) -> None:
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", 0x80 | opcode, size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", 0x80 | opcode, 126, size)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 127, size)
    connection.sendall(head + payload)


def read_frame(stream: BinaryIO) -> tuple[int, bytes] | None:
    """Opcode and payload of the next frame (clients of this protocol do not fragment), or None."""
    head = stream.read(2)
    if len(head) < 2:
        return None
    opcode, size = head[0] & 0x0F, head[1] & 0x7F
    if size == 126:
        size = int.from_bytes(stream.read(2), "big")
    elif size == 127:
        size = int.from_bytes(stream.read(8), "big")
    mask = stream.read(4)
    payload = stream.read(size)
    if len(payload) < size:
        return None
    return opcode, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
