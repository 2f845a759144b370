"""What a run wrote, as one page, one JSON and one table. Free of Ray and torch; the same input gives the same bytes."""
