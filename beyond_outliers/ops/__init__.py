"""Operations that are not left to XLA or another library as they are; each module says why."""
