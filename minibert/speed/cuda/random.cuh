// Stateless random numbers: a function of a seed and of the number's position.
// Include primitives.cuh first.
#pragma once

// 64 random bits from a seed and two counters: Philox 2x32 with seven rounds, the fewest that pass
// BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
DEVICE u64 philox(u64 seed, u32 counter0, u32 counter1) {
  u32 key = (u32)seed;
  counter1 ^= (u32)(seed >> 32);
  UNROLL for (int round = 0; round < 7; round++) {
    const u64 product = (u64)0xD256D193u * counter0;
    counter0 = (u32)(product >> 32) ^ key ^ counter1;
    counter1 = (u32)product;
    key += 0x9E3779B9u;
  }
  return (u64)counter1 << 32 | counter0;
}
