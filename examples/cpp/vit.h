// A vision transformer (benchmarks/models/tiny_vit.py) written against an engine's views: it keeps their
// addresses and no weights of its own, so each switch of the engine changes the model at once.
#pragma once

#include <paretofuse/engine.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

class VisionTransformer {
 public:
  using Vector = std::vector<float>;

  // All sizes but the number of attention heads follow from the shapes.
  VisionTransformer(const paretofuse::Engine& engine, std::size_t heads)
      : heads_(heads),
        patch_(engine, "patch_embed"),
        class_token_(data(engine, "class_token")),
        positions_(data(engine, "positions")),
        norm_(engine, "norm"),
        head_(engine, "head"),
        dim_(patch_.outputs),
        side_(static_cast<std::size_t>(engine.tensor("patch_embed.weight").shape[3])),
        tokens_(static_cast<std::size_t>(engine.tensor("positions").shape[1])) {
    for (std::size_t number = 0; has(engine, "blocks." + std::to_string(number) + ".norm1.weight");
         ++number) {
      blocks_.emplace_back(engine, "blocks." + std::to_string(number) + ".");
    }
    if (heads_ == 0 || dim_ % heads_ != 0) throw std::invalid_argument("heads that do not divide the width");
  }

  // Class logits of one image of `size` x `size` pixels, row by row.
  Vector logits(const Vector& image, std::size_t size) const {
    Vector tokens = embed(image, size);
    for (const Block& block : blocks_) {
      add(tokens, attention(block, block.norm1(tokens)));
      Vector hidden = block.fc1(block.norm2(tokens));
      for (float& x : hidden) x = 0.5f * x * (1 + std::erf(x * 0.70710678f));  // GELU
      add(tokens, block.fc2(hidden));
    }
    tokens.resize(dim_);  // the class token
    return head_(norm_(tokens));
  }

 private:
  static bool has(const paretofuse::Engine& engine, const std::string& name) {
    const auto& names = engine.tensor_names();
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  static const float* data(const paretofuse::Engine& engine, const std::string& name) {
    const paretofuse::TensorView& view = engine.tensor(name);
    if (view.dtype != "F32") throw std::invalid_argument(name + ": this example reads float32 stores only");
    return static_cast<const float*>(view.data);
  }

  static void add(Vector& to, const Vector& what) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += what[i];
  }

  struct Linear {
    Linear(const paretofuse::Engine& engine, const std::string& name)
        : weight(data(engine, name + ".weight")),
          bias(data(engine, name + ".bias")),
          outputs(static_cast<std::size_t>(engine.tensor(name + ".bias").shape[0])),
          inputs(static_cast<std::size_t>(engine.tensor(name + ".weight").nbytes) / sizeof(float) / outputs) {
    }

    // Each row of `inputs` numbers becomes one of `outputs`.
    Vector operator()(const Vector& x) const {
      const std::size_t rows = x.size() / inputs;
      Vector y(rows * outputs);
      for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t o = 0; o < outputs; ++o) {
          y[r * outputs + o] = bias[o] + dot(weight + o * inputs, &x[r * inputs], inputs);
        }
      }
      return y;
    }

    const float* weight;  // [outputs, inputs]
    const float* bias;
    std::size_t outputs, inputs;
  };

  struct Norm {
    Norm(const paretofuse::Engine& engine, const std::string& name)
        : weight(data(engine, name + ".weight")),
          bias(data(engine, name + ".bias")),
          size(static_cast<std::size_t>(engine.tensor(name + ".bias").shape[0])) {}

    Vector operator()(const Vector& x) const {
      Vector y(x.size());
      for (std::size_t start = 0; start < x.size(); start += size) {
        double mean = 0, variance = 0;
        for (std::size_t i = 0; i < size; ++i) mean += x[start + i];
        mean /= static_cast<double>(size);
        for (std::size_t i = 0; i < size; ++i) variance += (x[start + i] - mean) * (x[start + i] - mean);
        const double scale = 1 / std::sqrt(variance / static_cast<double>(size) + 1e-5);
        for (std::size_t i = 0; i < size; ++i) {
          y[start + i] = static_cast<float>((x[start + i] - mean) * scale) * weight[i] + bias[i];
        }
      }
      return y;
    }

    const float* weight;
    const float* bias;
    std::size_t size;
  };

  struct Block {
    Block(const paretofuse::Engine& engine, const std::string& prefix)
        : norm1(engine, prefix + "norm1"),
          norm2(engine, prefix + "norm2"),
          qkv(engine, prefix + "attn.qkv"),
          proj(engine, prefix + "attn.proj"),
          fc1(engine, prefix + "mlp.fc1"),
          fc2(engine, prefix + "mlp.fc2") {}

    Norm norm1, norm2;
    Linear qkv, proj, fc1, fc2;
  };

  // Eight running sums, which the compiler turns into vectors.
  static float dot(const float* a, const float* b, std::size_t count) {
    float sums[8] = {};
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (std::size_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (; i < count; ++i) sums[0] += a[i] * b[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  // [tokens, dim]: the class token and the patches, with their positions.
  Vector embed(const Vector& image, std::size_t size) const {
    const std::size_t across = size / side_;
    if (across * across + 1 != tokens_)
      throw std::invalid_argument("images of another size than the model's");
    Vector tokens(class_token_, class_token_ + dim_);
    Vector patch(side_ * side_);
    for (std::size_t number = 0; number < across * across; ++number) {
      const std::size_t top = number / across * side_, left = number % across * side_;
      for (std::size_t i = 0; i < patch.size(); ++i) {
        patch[i] = image[(top + i / side_) * size + left + i % side_];
      }
      const Vector embedded = patch_(patch);
      tokens.insert(tokens.end(), embedded.begin(), embedded.end());
    }
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] += positions_[i];
    return tokens;
  }

  Vector attention(const Block& block, const Vector& x) const {
    const Vector qkv = block.qkv(x);  // [tokens, 3, heads, width]
    const std::size_t width = dim_ / heads_;
    Vector mixed(tokens_ * dim_), shares(tokens_);
    for (std::size_t h = 0; h < heads_; ++h) {
      const auto part = [&](std::size_t token, std::size_t which) {
        return &qkv[(token * 3 + which) * dim_ + h * width];
      };
      for (std::size_t q = 0; q < tokens_; ++q) {
        float total = 0, most = -INFINITY;
        for (std::size_t k = 0; k < tokens_; ++k) {
          shares[k] = dot(part(q, 0), part(k, 1), width) / std::sqrt(static_cast<float>(width));
          most = std::max(most, shares[k]);
        }
        for (float& share : shares) total += share = std::exp(share - most);
        for (std::size_t k = 0; k < tokens_; ++k) {
          const float* value = part(k, 2);
          for (std::size_t i = 0; i < width; ++i) {
            mixed[q * dim_ + h * width + i] += shares[k] / total * value[i];
          }
        }
      }
    }
    return block.proj(mixed);
  }

  std::size_t heads_;
  Linear patch_;
  const float* class_token_;
  const float* positions_;
  Norm norm_;
  Linear head_;
  std::size_t dim_, side_, tokens_;
  std::vector<Block> blocks_;
};
