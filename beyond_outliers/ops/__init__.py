"""Operations that are not left to XLA as they are, each with why and on which backend."""
