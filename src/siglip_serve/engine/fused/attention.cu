// Self-attention for Hopper GPUs (compute capability 9.0a): softmax(Q K^T / sqrt(DEPTH)) V, not causal.
//
// Compiled by attention.py, which defines the constants in capitals. It replaces the line PRODUCTS by the matrix
// instructions (`scores`, `mix`), whose text depends on sizes.
//
// qkv is [images, TOKENS, 3, HEADS, DEPTH], result [images, TOKENS, HEADS, DEPTH], of TYPE (16 bits). A block of
// threads stays on its multiprocessor and works through items. An item is one head of one image and SHARE tiles of
// 64 queries. One thread of the last warpgroup (128 threads) makes the copy engine load queries, keys and values into
// shared memory, as far ahead as there is room. The other READERS warpgroups are the readers. They take one tile after
// the other and read all keys, BLOCK at a time, with the running maximum and sum of FlashAttention. A reader does not
// overlap its own steps: while it computes exponentials, the matrix units work for another reader.
//
// A row of 128 bytes (64 columns) is swizzled in shared memory, as the matrix units read it fastest. Columns beyond 64
// (72 = 64 + 8) are stored behind all rows, 16 bytes per row. A product over queries and keys takes 16 columns at
// once, so zeros stand in for the next 8. Values have a second row of 128 bytes instead, whose end the copy engine
// fills with zeros, so that one instruction reaches all columns.

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TensorMap {
  u64 words[16];
};

static constexpr int kTile = 64;                     // queries: the rows of a matrix instruction
static constexpr int kWide = DEPTH / 64 * 64;        // columns in rows of 128 bytes
static constexpr bool kNarrow = DEPTH > kWide;       // 8 more columns
static constexpr int kValueRows = (DEPTH + 63) / 64;  // rows of 128 bytes per value
static constexpr int kGroups = ((TOKENS + kTile - 1) / kTile + SHARE - 1) / SHARE;  // items per head
static constexpr int kBlocks = (TOKENS + BLOCK - 1) / BLOCK;
static constexpr int kBox = BLOCK > 256 ? BLOCK / 2 : BLOCK;  // rows of a copy, whose engine takes 256 at most
static constexpr int kValid = TOKENS - (kBlocks - 1) * BLOCK;  // keys of the last block
static constexpr int kLast = (kValid + 15) / 16 * 16;          // rows of it that are computed

static constexpr u32 kQueryWide = kTile * 2 * kWide, kQueryBytes = kQueryWide + (kNarrow ? kTile * 16 : 0);
static constexpr u32 kKeyWide = BLOCK * 2 * kWide, kKeyBytes = kKeyWide + (kNarrow ? BLOCK * 16 : 0);
static constexpr u32 kKeyStep = (kKeyBytes + 1023) / 1024 * 1024;  // swizzled rows begin at multiples of 1 kB
static constexpr u32 kValueBytes = BLOCK * 128 * kValueRows;
static constexpr u32 kQueries = 1024;  // behind the barriers
static constexpr u32 kKeys = kQueries + SLOTS * kQueryBytes;
static constexpr u32 kValues = kKeys + STAGES * kKeyStep;
static constexpr u32 kZeros = kValues + STAGES * kValueBytes;
static constexpr int kZeroRows = kNarrow ? BLOCK > kTile ? BLOCK : kTile : 0;
static_assert(kZeros + kZeroRows * 16 == SHARED_BYTES, "attention.py and attention.cu disagree on shared memory");
static_assert(DEPTH == 64 || DEPTH == 72, "");
static_assert(BLOCK % kBox == 0 && kBox % 8 == 0, "");  // each copy begins at a multiple of 1 kB
static_assert(kQueryBytes >= kTile * DEPTH * 2 && SHARE <= SLOTS, "");
// A barrier distinguishes only two phases, so a reader that waits for a phase must have waited for the one before it.
// Therefore it must not skip a stage between two of its own, nor take queries from the slot of another reader.
static_assert(SLOTS % READERS == 0, "");
static_assert(kBlocks == 1 ? SHARE >= READERS || STAGES % READERS == 0 : SHARE == READERS, "");

// Barriers of 8 bytes. Full memory has been copied, empty memory may be overwritten.
static constexpr u32 kKeyFull = 0, kKeyEmpty = STAGES * 8, kValueFull = STAGES * 16, kValueEmpty = STAGES * 24,
                     kQueryFull = STAGES * 32, kQueryEmpty = kQueryFull + SLOTS * 8;
static_assert(kQueryEmpty + SLOTS * 8 <= kQueries, "");

__device__ __forceinline__ void init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Starts to copy a box. Elements beyond the columns of a head, or beyond the tokens, arrive as zeros.
__device__ __forceinline__ void copy(u32 to, const TensorMap& map, int column, int row, int head, int image,
                                     u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(image), "r"(barrier)
      : "memory");
}
// Orders earlier reads and writes of this thread before those of the copy engine and the matrix units.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Describes an operand of a matrix instruction: 8 columns are `leading` bytes from the next 8, 8 rows `stride` bytes.
__device__ __forceinline__ u64 plain(u32 address, u32 leading, u32 stride) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) | ((u64)(stride >> 4) << 32);
}
__device__ __forceinline__ u64 swizzled(u32 address, u32 leading) { return plain(address, leading, 1024) | (1ull << 62); }

PRODUCTS

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void finish_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

struct Item {
  int part, head, image;
  __device__ __forceinline__ explicit Item(int index)
      : part(index % kGroups), head(index / kGroups % HEADS), image(index / (kGroups * HEADS)) {}
};

// A thread's part of a tile: every fourth pair of columns of two rows, 8 apart.
struct Tile {
  float out[DEPTH / 2];
  float top[2], sum[2];  // maximum of the scores so far, and sum of their exponentials in this thread's columns
};

template <int N>
__device__ __forceinline__ void multiply(float (&s)[N / 2], u32 query, u32 key, u32 key_narrow, u32 zeros) {
#pragma unroll
  for (int i = 0; i < kWide / 16; i++)
    scores<N>(s, swizzled(query + i * 32, 16), swizzled(key + i * 32, 16), i > 0);
  if (kNarrow) {
    const u32 query_narrow = query + kQueryWide;
    scores<N>(s, plain(query_narrow, zeros - query_narrow, 128), plain(key_narrow, zeros - key_narrow, 128), 1);
  }
}

// Turns scores into exponentials, the operands of the next product. Sums with a lower maximum are scaled down.
template <int N, bool FIRST>
__device__ __forceinline__ void soften(float (&s)[N / 2], u32 (&p)[N / 4], Tile& tile) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = FIRST ? s[2 * r] : tile.top[r], other = s[2 * r + 1];  // two at once halve the chain
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      top = fmaxf(top, s[4 * j + 2 * r]);
      other = fmaxf(other, s[4 * j + 2 * r + 1]);
    }
    top = quad_max(fmaxf(top, other));
    const float shift = top * SCALE;
    float sum = 0, other_sum = 0;
    if (!FIRST) {
      const float keep = exp2_fast(tile.top[r] * SCALE - shift);
      sum = tile.sum[r] * keep;
#pragma unroll
      for (int j = 0; j < DEPTH / 8; j++) tile.out[4 * j + 2 * r] *= keep, tile.out[4 * j + 2 * r + 1] *= keep;
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float a = exp2_fast(s[4 * j + 2 * r] * SCALE - shift);
      const float b = exp2_fast(s[4 * j + 2 * r + 1] * SCALE - shift);
      sum += a;
      other_sum += b;
      p[2 * j + r] = pack(a, b);
    }
    tile.top[r] = top;
    tile.sum[r] = sum + other_sum;
  }
}

// Attends to N keys from `row` of a stage, VALID of which are tokens. FIRST: these are the first keys of the tile.
// WAIT: they are the first rows of the stage, so wait for its copies. RELEASE: they are its last, so release it.
template <int N, int VALID, bool FIRST, bool WAIT, bool RELEASE>
__device__ __forceinline__ void attend(Tile& tile, u32 query, u32 base, u32 place, u32 row) {
  const int lane = threadIdx.x % 32;
  const u32 stage = place % STAGES, parity = place / STAGES & 1;
  const u32 key = base + kKeys + stage * kKeyStep, value = base + kValues + stage * kValueBytes + row * 128;
  float s[N / 2];
  u32 p[N / 4];
  if (WAIT) wait(base + kKeyFull + stage * 8, parity);
  begin_products();
  multiply<N>(s, query, key + row * 128, key + kKeyWide + row * 16, base + kZeros);
  finish_products();
  if (RELEASE && lane == 0) arrive(base + kKeyEmpty + stage * 8);
#pragma unroll
  for (int j = VALID / 8; j < N / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (8 * j + lane % 4 * 2 + i % 2 >= VALID) s[4 * j + i] = -1e30f;
  soften<N, FIRST>(s, p, tile);
  if (WAIT) wait(base + kValueFull + stage * 8, parity);
  begin_products();
#pragma unroll
  for (int i = 0; i < N / 16; i++)
    mix(tile.out, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], swizzled(value + i * 2048, BLOCK * 128),
        !FIRST || i > 0);
  finish_products();
  if (RELEASE && lane == 0) arrive(base + kValueEmpty + stage * 8);
}

// `place` counts the stages that the producer has filled before this tile's first.
__device__ __forceinline__ void attend_all(Tile& tile, u32 query, u32 base, u32 place) {
  if constexpr (kBlocks == 1 && HALF > 0) {  // two parts: the scores of all keys need too many registers
    attend<HALF, HALF, true, true, false>(tile, query, base, place, 0);
    attend<kLast - HALF, kValid - HALF, false, false, true>(tile, query, base, place, HALF);
  } else if constexpr (kBlocks == 1) {
    attend<kLast, kValid, true, true, true>(tile, query, base, place, 0);
  } else {
    attend<BLOCK, BLOCK, true, true, true>(tile, query, base, place, 0);
    for (int b = 1; b < kBlocks - 1; b++) attend<BLOCK, BLOCK, false, true, true>(tile, query, base, place + b, 0);
    attend<kLast, kValid, false, true, true>(tile, query, base, place + kBlocks - 1, 0);
  }
}

// Writes a warp's 16 rows to global memory, through the memory of their queries, so that whole rows leave at once.
__device__ __forceinline__ void write(const Tile& tile, char* staged, char* to, int rows) {
  const int lane = threadIdx.x % 32;
  constexpr int kChunks = DEPTH / 8, kSwizzle = DEPTH % 64 ? 0 : 7;  // of 16 bytes, swizzled against bank conflicts
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float factor = 1 / quad_sum(tile.sum[r]);
    const int row = lane / 4 + 8 * r;
#pragma unroll
    for (int j = 0; j < kChunks; j++)
      *(u32*)(staged + row * (DEPTH * 2) + (j ^ (row & kSwizzle)) * 16 + lane % 4 * 4) =
          pack(tile.out[4 * j + 2 * r] * factor, tile.out[4 * j + 2 * r + 1] * factor);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (row < rows)
      *(uint4*)(to + (u64)row * (HEADS * DEPTH * 2) + chunk * 16) =
          *(const uint4*)(staged + row * (DEPTH * 2) + (chunk ^ (row & kSwizzle)) * 16);
  }
}

__device__ __forceinline__ void produce(const TensorMap& query_map, const TensorMap& query_narrow_map,
                                        const TensorMap& key_map, const TensorMap& key_narrow_map, u32 base, int items) {
  u32 place = 0, count = 0;  // stages and tiles so far
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item(index);
    for (int t = 0; t < SHARE; t++, count++) {
      const u32 slot = count % SLOTS, full = base + kQueryFull + slot * 8, to = base + kQueries + slot * kQueryBytes;
      const int row = (item.part * SHARE + t) * kTile;
      wait(base + kQueryEmpty + slot * 8, count / SLOTS & 1 ^ 1);
      expect(full, kQueryBytes);
      copy(to, query_map, 0, row, item.head, item.image, full);
      if (kNarrow) copy(to + kQueryWide, query_narrow_map, kWide, row, item.head, item.image, full);
    }
    for (int b = 0; b < kBlocks; b++, place++) {
      const u32 stage = place % STAGES, free = place / STAGES & 1 ^ 1;
      const u32 key = base + kKeys + stage * kKeyStep, value = base + kValues + stage * kValueBytes;
      u32 full = base + kKeyFull + stage * 8;
      wait(base + kKeyEmpty + stage * 8, free);
      expect(full, kKeyBytes);
      for (int r = 0; r < BLOCK; r += kBox) {
        const int row = b * BLOCK + r;
        copy(key + r * 2 * kWide, key_map, 0, row, HEADS + item.head, item.image, full);
        if (kNarrow) copy(key + kKeyWide + r * 16, key_narrow_map, kWide, row, HEADS + item.head, item.image, full);
      }
      full = base + kValueFull + stage * 8;
      wait(base + kValueEmpty + stage * 8, free);
      expect(full, kValueBytes);
      for (int c = 0; c < kValueRows; c++)
        for (int r = 0; r < BLOCK; r += kBox)
          copy(value + (c * BLOCK + r) * 128, key_map, c * 64, b * BLOCK + r, 2 * HEADS + item.head, item.image, full);
    }
  }
}

__device__ __forceinline__ void read(char* memory, u32 base, char* result, int items, int reader) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int tiles = (items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * SHARE;
  for (int index = reader; index < tiles; index += READERS) {
    const Item item(blockIdx.x + index / SHARE * gridDim.x);
    const u32 slot = index % SLOTS, query = kQueries + slot * kQueryBytes;
    Tile tile;
    wait(base + kQueryFull + slot * 8, index / SLOTS & 1);
    attend_all(tile, base + query, base, index / SHARE * kBlocks);
    asm volatile("bar.sync %0, 128;" ::"r"(reader + 1) : "memory");  // all four warps have read the queries
    const int first = (item.part * SHARE + index % SHARE) * kTile + warp * 16;
    write(tile, memory + query + warp * (16 * DEPTH * 2),
          result + (((u64)item.image * TOKENS + first) * HEADS + item.head) * (DEPTH * 2), TOKENS - first);
    fence_shared();
    __syncwarp();
    if (lane == 0) arrive(base + kQueryEmpty + slot * 8);
  }
}

extern "C" __global__ void __launch_bounds__(READERS * 128 + 128, 1)
attention(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap query_narrow_map,
          const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap key_narrow_map, char* result,
          int images) {
  extern __shared__ __align__(1024) char memory[];
  const u32 base = (u32)__cvta_generic_to_shared(memory);
  const int items = images * HEADS * kGroups;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < STAGES * 8; i += 8) {
      init(base + kKeyFull + i, 1);
      init(base + kValueFull + i, 1);
      init(base + kKeyEmpty + i, 4 * SHARE);  // a warp of each reader's tile
      init(base + kValueEmpty + i, 4 * SHARE);
    }
    for (u32 i = 0; i < SLOTS * 8; i += 8) {
      init(base + kQueryFull + i, 1);
      init(base + kQueryEmpty + i, 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < kZeroRows; i += blockDim.x)
    *(uint4*)(memory + kZeros + i * 16) = make_uint4(0, 0, 0, 0);
  fence_shared();
  __syncthreads();

  // The shuffle tells the compiler that a whole warp has one role, as each role has its own number of registers.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == READERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == READERS * 128) produce(query_map, query_narrow_map, key_map, key_narrow_map, base, items);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    read(memory, base, result, items, warpgroup);
  }
}
