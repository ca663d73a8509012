"""What the command table says about one command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the command table; `name` is upper case, a subcommand's name is `CONTAINER SUB`.

    arity: number of arguments with all names; negative: at least so many.
    flags: as in COMMAND INFO (write, readonly, denyoom, admin, pubsub, noscript, loading, stale, fast, no_auth,
    blocking, no_multi ...). keys: (first, last, step) positions counted with the names, (0, 0, 0) for none.
    categories: ACL categories beyond those that follow from the flags, without `@`.
    syntax: arguments only. errors: words a client may see beyond ERR and WRONGTYPE.
    """

    name: str
    group: str
    arity: int
    flags: str = ""
    keys: tuple[int, int, int] = (0, 0, 0)
    categories: str = ""
    syntax: str = ""
    summary: str = ""
    complexity: str = "O(1)"
    since: str = "1.0.0"
    errors: str = ""
    is_container: bool = False

    @property
    def flag_set(self) -> frozenset[str]:
        """The flags, one by one."""
        return frozenset(self.flags.split())

    @property
    def acl_categories(self) -> frozenset[str]:
        """All ACL categories: the given ones and those that follow from flags, as in Redis."""
        flags = self.flag_set
        found = set(self.categories.split())
        if "write" in flags:
            found.add("write")
        if "readonly" in flags and "scripting" not in found:
            found.add("read")
        if "admin" in flags:
            found |= {"admin", "dangerous"}
        if "pubsub" in flags:
            found.add("pubsub")
        if "blocking" in flags:
            found.add("blocking")
        found.add("fast" if "fast" in flags else "slow")
        return frozenset(found)
