"""Linux namespaces through the C library: what a jailed process can see and reach.

Runs in a process of its own, before any untrusted code, and only from `jail.py`. Standard library
alone: nothing else of the machine's Python is visible afterwards.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/fcntl.h>
_NEW_MOUNTS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x1, 0x2, 0x4
_HERE, _RECURSIVE, _DETACH = -100, 0x8000, 0x2
_DEATH_SIGNAL, _DUMPABLE, _DROP_BOUND, _NO_NEW_PRIVILEGES = 1, 4, 24, 38
_CAPABILITIES_V3 = 0x20080522

_MOUNT_SETATTR = 442  # one number on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_KEYCTL = {"x86_64": 250, "aarch64": 219}

_WORKER = 1000
"""Who the worker is inside; outside it is nobody."""
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def isolate(visible: list[str], folder_bytes: int, folder_files: int) -> None:
    """Leave the machine's namespaces; the caller's next child is process 1 of a new world.

    That world has no network device, the `visible` folders read-only, three devices, and an empty
    /tmp in memory that vanishes with it. The caller stays outside its process namespace, where
    untrusted code cannot see or signal it.

    visible: folders and links to folders, none inside another.

    Raises:
        OSError: the kernel, or the container this runs in, does not allow it.
    """
    machine = platform.machine()
    if machine not in _PIVOT_ROOT:
        raise OSError(0, f"unknown processor {machine}")
    _new_user()
    # A second user namespace would give the code capabilities over kernel code it has no need of.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    _mount(None, "/", None, _REC | _PRIVATE)
    root = "/proc"  # any folder that is always there: what is below it is hidden, and not needed
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=512,mode=755")
    for folder in visible:
        inside = root + folder
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), inside)
        elif os.path.isdir(folder):
            os.mkdir(inside)
            _mount(folder, inside, None, _BIND | _REC)
            _restrict(inside, _RECURSIVE, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    os.mkdir(f"{root}/dev")
    for device in ("null", "zero", "urandom"):
        Path(f"{root}/dev/{device}").touch()
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, _BIND)
    os.mkdir(f"{root}/tmp")
    size = f"size={folder_bytes},nr_inodes={folder_files},mode=1777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, size)
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    _restrict("/", 0, _ATTR_RDONLY)
    os.chdir("/tmp")
    _check(_libc.syscall(_KEYCTL[machine], 1, None), "keyctl", allowed=True)


def drop_privileges() -> None:
    """Give up every capability for good, and being root where the machine's root runs this."""
    for capability in range(64):
        if _libc.prctl(_DROP_BOUND, capability, 0, 0, 0):
            break
    if os.getuid() == 0 and _maps_worker():
        os.setgroups([])
        os.setresgid(_WORKER, _WORKER, _WORKER)
        os.setresuid(_WORKER, _WORKER, _WORKER)
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_DUMPABLE, 0, 0, 0, 0), "prctl")


def die_with_parent(signal: int) -> None:
    """Have the kernel send this signal when the parent ends. Changing the user undoes it."""
    _check(_libc.prctl(_DEATH_SIGNAL, signal, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends (Linux)."""
    _check(_libc.prctl(36, 1, 0, 0, 0), "prctl")


def _new_user() -> None:
    """unshare(2). The machine's root maps a second, powerless user: limits on the number of
    processes do not bind root, whatever namespace it is in."""
    user, group = os.geteuid(), os.getegid()
    flags = _NEW_USER | _NEW_PID | _NEW_NET | _NEW_MOUNTS | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
    if user != 0:
        _check(_libc.unshare(flags), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return
    # Only a process outside the new namespace may map users that are not its own.
    outer = os.getpid()
    receive, send = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        status = 1
        try:
            os.close(send)
            if os.read(receive, 1):
                for kind in ("uid", "gid"):
                    path = Path(f"/proc/{outer}/{kind}_map")
                    path.write_text(f"0 0 1\n{_WORKER} {_NOBODY} 1")
                status = 0
        finally:
            os._exit(status)
    try:
        _check(_libc.unshare(flags), "unshare")
        os.write(send, b"x")
    finally:
        os.close(receive)
        os.close(send)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise OSError(0, "mapping users: not permitted")


def _maps_worker() -> bool:
    try:
        os.setresgid(-1, _WORKER, -1)
    except OSError:
        return False
    os.setresgid(-1, 0, -1)
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    done = _libc.mount(
        text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data or None)
    )
    _check(done, f"mount {target}")


def _restrict(target: str, how: int, attributes: int) -> None:
    settings = struct.pack("=QQQQ", attributes, 0, 0, 0)
    done = _libc.syscall(
        _MOUNT_SETATTR, _HERE, os.fsencode(target), how, settings, ctypes.c_size_t(len(settings))
    )
    _check(done, f"mount_setattr {target}")


def _check(result: int, what: str, allowed: bool = False) -> None:
    if result < 0 and not allowed:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
