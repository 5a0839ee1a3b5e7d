// Classifies images at three preferences with one model in memory: the demo's vision transformer.
//
//     classify STORE IMAGES LABELS [HEADS]      MNIST's idx files; attention heads, 4 by default
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <vector>

#include "idx.h"
#include "vit.h"

int main(int count, char** arguments) {
  if (count < 4) return std::fprintf(stderr, "usage: classify STORE IMAGES LABELS [HEADS]\n"), 2;
  try {
    paretofuse::Engine engine = paretofuse::Engine::open(arguments[1]);
    const Idx images = read_idx(arguments[2], 3), labels = read_idx(arguments[3], 1);
    const std::size_t size = images.shape[1], pixels = size * images.shape[2];
    if (engine.objectives().size() != 2 || images.shape[1] != images.shape[2] ||
        images.shape[0] != labels.shape[0]) {
      throw std::invalid_argument("expected two objectives, square images, and a label for each");
    }
    const VisionTransformer model(engine, count > 4 ? std::strtoul(arguments[4], nullptr, 10) : 4);
    for (const double share : {1.0, 0.5, 0.0}) {
      engine.switch_to({share, 1 - share});
      std::size_t right = 0;
      for (std::size_t number = 0; number < labels.bytes.size(); ++number) {
        std::vector<float> image(pixels);
        for (std::size_t i = 0; i < pixels; ++i) {
          image[i] = static_cast<float>(images.bytes[number * pixels + i]) / 127.5f - 1;
        }
        const std::vector<float> logits = model.logits(image, size);
        const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        right += best == labels.bytes[number];
      }
      std::printf("preference %g %g: %zu of %zu right, accuracy %.4f\n", share, 1 - share, right,
                  labels.bytes.size(), static_cast<double>(right) / static_cast<double>(labels.bytes.size()));
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
