"""The operating system and what lies on it: files, object stores, child processes, the CPU."""
