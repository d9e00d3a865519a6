"""Seconds to an accuracy, on real pictures."""

from .rounds import Found, Given, Missing


def mnist(given: Given, students: int) -> Found:
    raise Missing("not there yet")


def cifar(given: Given, students: int) -> Found:
    raise Missing("not there yet")
