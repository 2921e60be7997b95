// Causal attention within each of some sequences that stand one after another, there and back.
//
// A register holds a number of as many queries as it has lanes. So the scores of a block of queries
// are one register a key: what softmax does is done to whole registers, and all the rest is
// products, of tiles whose sums stay in registers. Keys that no query of a block may see are left
// out. What is not kept on the way there is made again on the way back (Dao 2023).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__) && !defined(NARROW)
constexpr int LANES = 16, TALL = 8;
#else
constexpr int LANES = 8, TALL = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
struct alignas(4 * LANES) Line {
  float at[LANES];
};

inline Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
inline const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes all(float x) { return x - Lanes{}; }

// e^x for x <= 0: 2^n times the Taylor series of what is left, at most ln(2) / 2. NaN stays
// NaN: the comparison lets it pass, and each product with it is NaN too.
inline Lanes exponential(Lanes x) {
  Lanes least = all(-87.0f);
  x = x < least ? least : x;
  Lanes n = x * 1.44269504f + 12583039.0f;  // 1.5 * 2^23: a sum with it is a whole number; and 127
  Lanes power = (Lanes)((Whole)n << 23);    // that a float's exponent is above its power
  n -= 12583039.0f;
  Lanes rest = x - n * 0.693359375f;
  rest -= n * -2.12194440e-4f;
  Lanes sum = all(1.0f / 720);
  for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + term;
  return sum * power;
}

// `x`, with `other` in the first `count` lanes.
inline Lanes after(int count, Lanes x, float other) {
  Whole lane;
  for (int l = 0; l < LANES; l++) lane[l] = l;
  return lane < count ? all(other) : x;
}

template <int FAR, size_t... lane>
inline void exchange(Lanes& a, Lanes& b, std::index_sequence<lane...>) {
  Lanes first = __builtin_shufflevector(a, b, (lane & FAR ? lane - FAR + LANES : lane)...);
  b = __builtin_shufflevector(a, b, (lane & FAR ? lane + LANES : lane + FAR)...);
  a = first;
}

template <int FAR>
inline void exchanges(Lanes* rows) {
#pragma GCC unroll 16
  for (int r = 0; r < LANES; r++)
    if (!(r & FAR)) exchange<FAR>(rows[r], rows[r + FAR], std::make_index_sequence<LANES>());
  if constexpr (FAR > 1) exchanges<FAR / 2>(rows);
}

// Up to LANES rows of `size` numbers, turned: a lane for each row.
void turn(const float* from, long row, int rows, int size, float* to) {
  for (int at = 0; at < size; at += LANES) {
    Lanes block[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) block[r] = lanes(from + std::min(r, rows - 1) * row + at);
    exchanges<LANES / 2>(block);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) lanes(to + (at + r) * LANES) = block[r];
  }
}

// A factor: its number in row r and column c is at[r * row + c * column].
struct Factor {
  const float* at;
  long row, column;
};

template <int WIDE>
inline void tile(int rows, int depth, Factor a, const float* b, long b_row, float* c, long c_row,
                 bool add) {
  Lanes sum[TALL][WIDE];
  const float* from[TALL];
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++) {
    int row = std::min(r, rows - 1);  // where there are fewer, the last is made again
    from[r] = a.at + row * a.row;
    for (int w = 0; w < WIDE; w++) sum[r][w] = add ? lanes(c + row * c_row + w * LANES) : Lanes{};
  }
  for (int k = 0; k < depth; k++) {
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
      for (int w = 0; w < WIDE; w++)
        sum[r][w] += from[r][k * a.column] * lanes(b + k * b_row + w * LANES);
  }
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++)
    for (int w = 0; w < WIDE; w++) lanes(c + std::min(r, rows - 1) * c_row + w * LANES) = sum[r][w];
}

// c = a b, or c + a b; b and c have whole LANES of columns that lie side by side.
void product(int rows, int columns, int depth, Factor a, const float* b, long b_row, float* c,
             long c_row, bool add = false) {
  for (int row = 0; row < rows; row += TALL, a.at += TALL * a.row, c += TALL * c_row) {
    int column = 0, these = std::min(TALL, rows - row);
    for (; column + 2 * LANES <= columns; column += 2 * LANES)
      tile<2>(these, depth, a, b + column, b_row, c + column, c_row, add);
    if (column < columns) tile<1>(these, depth, a, b + column, b_row, c + column, c_row, add);
  }
}

}  // namespace

extern "C" {

// A tensor [N, heads, size], and how many numbers lie between tokens and between heads.
struct Tokens {
  float* at;
  int64_t token, head;
  float* row(int t, int h) const { return at + t * token + h * head; }
};

// Where sequences start, and their end; heads of queries, and of keys and values; numbers a head.
struct Sizes {
  const int32_t* starts;
  int32_t sequences, heads, groups, size;
  float scale;
  int32_t threads;
};

void attention(const Sizes* sizes, Tokens q, Tokens k, Tokens v, Tokens out, Tokens lse) {
  const Sizes s = *sizes;
#pragma omp parallel for collapse(2) num_threads(s.threads) if (s.threads > 1)
  for (int sequence = 0; sequence < s.sequences; sequence++)
    for (int head = 0; head < s.heads; head++) {
      int start = s.starts[sequence], length = s.starts[sequence + 1] - start;
      int group = head / (s.heads / s.groups);
      const float *key = k.row(start, group), *value = v.row(start, group);
      std::vector<Line> memory(s.size + length);
      float *turned = memory.data()->at, *scores = turned + s.size * LANES;
      for (int first = 0; first < length; first += LANES) {
        int rows = std::min(LANES, length - first), seen = first + rows;
        turn(q.row(start + first, head), q.token, rows, s.size, turned);
        product(seen, LANES, s.size, {key, k.token, 1}, turned, LANES, scores, LANES);
        Lanes top = all(-INFINITY), sum{};
        for (int j = 0; j < seen; j++) {
          Lanes& score = lanes(scores + j * LANES);
          score = after(j - first, score * s.scale, -INFINITY);
          top = score > top ? score : top;
        }
        for (int j = 0; j < seen; j++) {
          Lanes& score = lanes(scores + j * LANES);
          sum += score = exponential(score - top);
        }
        for (int j = 0; j < seen; j++) lanes(scores + j * LANES) *= 1.0f / sum;
        for (int r = 0; r < rows; r++) *lse.row(start + first + r, head) = top[r] + std::log(sum[r]);
        product(rows, s.size, seen, {scores, 1, LANES}, value, v.token,
                out.row(start + first, head), out.token);
      }
    }
}

void attention_back(const Sizes* sizes, Tokens q, Tokens k, Tokens v, Tokens lse, Tokens dout,
                    Tokens dq, Tokens dk, Tokens dv) {
  const Sizes s = *sizes;
#pragma omp parallel for collapse(2) num_threads(s.threads) if (s.threads > 1)
  for (int sequence = 0; sequence < s.sequences; sequence++)
    for (int group = 0; group < s.groups; group++) {
      int start = s.starts[sequence], length = s.starts[sequence + 1] - start;
      const float *key = k.row(start, group), *value = v.row(start, group);
      std::vector<Line> memory(2 * (s.size + length));
      float *queries = memory.data()->at, *slopes = queries + s.size * LANES;
      float *shares = slopes + s.size * LANES, *dscores = shares + length * LANES;
      for (int token = start; token < start + length; token++) {
        std::fill_n(dk.row(token, group), s.size, 0.0f);
        std::fill_n(dv.row(token, group), s.size, 0.0f);
      }
      int heads = s.heads / s.groups;
      for (int head = group * heads; head < (group + 1) * heads; head++)
        for (int first = 0; first < length; first += LANES) {
          int rows = std::min(LANES, length - first), seen = first + rows;
          const float *query = q.row(start + first, head), *slope = dout.row(start + first, head);
          turn(query, q.token, rows, s.size, queries);
          turn(slope, dout.token, rows, s.size, slopes);
          product(seen, LANES, s.size, {key, k.token, 1}, queries, LANES, shares, LANES);
          product(seen, LANES, s.size, {value, v.token, 1}, slopes, LANES, dscores, LANES);
          Lanes known{}, mean{};
          for (int r = 0; r < rows; r++) known[r] = *lse.row(start + first + r, head);
          for (int j = 0; j < seen; j++) {
            Lanes& share = lanes(shares + j * LANES);
            share = after(j - first, exponential(share * s.scale - known), 0);
            mean += share * lanes(dscores + j * LANES);
          }
          for (int j = 0; j < seen; j++) {
            Lanes& dscore = lanes(dscores + j * LANES);
            dscore = lanes(shares + j * LANES) * (dscore - mean) * s.scale;
          }
          product(rows, s.size, seen, {dscores, 1, LANES}, key, k.token,
                  dq.row(start + first, head), dq.token);
          product(seen, s.size, rows, {shares, LANES, 1}, slope, dout.token,
                  dv.row(start, group), dv.token, true);
          product(seen, s.size, rows, {dscores, LANES, 1}, query, q.token,
                  dk.row(start, group), dk.token, true);
        }
    }
}

}  // extern "C"
