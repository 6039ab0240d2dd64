"""Clients of the load benchmark: answers in order however they are cut, and a connection that is lost is no answer."""

import json
import socket
import threading

import pytest

from benchmarks import clients


def serve(answers):
    """A server whose connections answer with what `answers` makes of a body: pieces to send, or None to hang up."""
    line = socket.create_server(("127.0.0.1", 0))

    def talk(peer):
        with peer, peer.makefile("rb") as stream:
            while stream.readline():
                length = 0
                while (field := stream.readline().strip()) != b"":
                    name, _, value = field.partition(b":")
                    length = int(value) if name == b"content-length" else length
                pieces = answers(json.loads(stream.read(length)))
                if pieces is None:
                    return
                for piece in pieces:
                    peer.sendall(piece)

    def accept():
        while True:
            try:
                peer, _ = line.accept()
            except OSError:
                return
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=talk, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return line


def test_answers_come_in_order_however_they_are_cut():
    def answers(body):
        content = b"x" * body
        return b"HTTP/1.1 20%d OK\r\nContent-" % (body % 3), b"Length: %d\r\n\r\n" % body + content[:1], content[1:]

    with serve(answers) as line:
        found = clients.load(line.getsockname()[1], [clients.encode("/", n) for n in range(40)], clients=3)
    assert [len(answer.content) for answer in found] == list(range(40))
    assert [answer.status for answer in found] == [200 + n % 3 for n in range(40)]
    assert all(answer.seconds > 0 for answer in found)


def test_a_connection_that_is_lost_is_no_answer():
    with serve(lambda body: None) as line, pytest.raises(ConnectionError):
        clients.load(line.getsockname()[1], [clients.encode("/", 1)], clients=1)
