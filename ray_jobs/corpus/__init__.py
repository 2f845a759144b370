"""From a course's files to packed token ids: read, clean, cut, encode, drop repeats, pack. Free of Ray and torch."""
