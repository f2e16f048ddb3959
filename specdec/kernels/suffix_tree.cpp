// The suffix tree of specdec/proposers/suffix_tree.py, and copies from it as specdec/proposers/suffix.py takes them.
//
// Those modules document the tree and the copies; this file has their results, bit by bit, so it must be compiled
// without contraction of products and sums. A place is a run of tokens: a node, or the position of the end of the run's
// only occurrence.

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr int64_t SEPARATOR = -1, NONE = -2;  // no tokens

using Place = int64_t;  // a position, or -1 - the index of a node

inline bool is_node(Place place) { return place < 0; }
inline int64_t index_of(Place place) { return -1 - place; }
inline Place of_index(int64_t index) { return -1 - index; }

// Places by token; searched one by one while they are few, as almost always.
class Children {
  public:
    Place* find(int64_t token) {
        if (index_) {
            const auto found = index_->find(token);
            return found == index_->end() ? nullptr : &entries_[found->second].second;
        }
        for (auto& entry : entries_)
            if (entry.first == token) return &entry.second;
        return nullptr;
    }
    void set(int64_t token, Place place) {
        if (Place* found = find(token)) {
            *found = place;
            return;
        }
        entries_.emplace_back(token, place);
        if (index_) (*index_)[token] = entries_.size() - 1;
        else if (entries_.size() > FEW) build_index();
    }
    void erase(int64_t token) {
        size_t at = 0;
        while (!index_ && entries_[at].first != token) at++;
        if (index_) {
            at = index_->at(token);
            index_->erase(token);
        }
        if (at + 1 < entries_.size()) {
            entries_[at] = entries_.back();
            if (index_) (*index_)[entries_[at].first] = at;
        }
        entries_.pop_back();
    }
    const std::vector<std::pair<int64_t, Place>>& entries() const { return entries_; }

  private:
    static constexpr size_t FEW = 16;
    void build_index() {
        index_ = std::make_unique<std::unordered_map<int64_t, size_t>>();
        for (size_t i = 0; i < entries_.size(); i++) (*index_)[entries_[i].first] = i;
    }
    std::vector<std::pair<int64_t, Place>> entries_;
    std::unique_ptr<std::unordered_map<int64_t, size_t>> index_;
};

struct Node {
    int64_t count = 0, total = 0, last = -1, likeliest = NONE;
    Children children;
};

class Tree {
  public:
    explicit Tree(int64_t depth) : depth_(depth) { new_node(); }

    void append(int64_t token) {
        const int64_t position = start_ + static_cast<int64_t>(text_.size());
        text_.push_back(token);
        std::vector<int64_t> runs{ROOT};
        for (size_t i = 0; i < open_.size(); i++) {
            const int64_t parent = open_[i], length = static_cast<int64_t>(i) + 1;
            const Place* found = nodes_[parent].children.find(token);
            int64_t child = NONE;
            if (found && is_node(*found)) {
                child = index_of(*found);
                nodes_[child].count++;
                nodes_[child].last = position;
            } else if (found) {
                child = second(*found, position, length);
                nodes_[parent].children.set(token, of_index(child));
            } else {
                nodes_[parent].children.set(token, position);
            }
            Node& node = nodes_[parent];
            node.total++;
            if (node.total == 1 || (node.likeliest != NONE && count(node, token) >= count(node, node.likeliest)))
                node.likeliest = token;
            if (child != NONE) runs.push_back(child);
        }
        if (static_cast<int64_t>(runs.size()) > depth_) runs.resize(depth_);
        open_ = std::move(runs);
    }

    void complete() {
        text_.push_back(SEPARATOR);
        open_ = {ROOT};
        const int64_t end = start_ + static_cast<int64_t>(text_.size());
        lengths_.push_back(end - begin_);
        begin_ = end;
    }

    void forget_oldest() {
        const int64_t length = lengths_.front(), first = start_ + num_forgotten_;
        lengths_.pop_front();
        for (int64_t position = first; position < first + length - 1; position++) uncount(position);
        num_forgotten_ += length;
        if (2 * num_forgotten_ >= static_cast<int64_t>(text_.size())) {
            text_.erase(text_.begin(), text_.begin() + num_forgotten_);
            start_ += num_forgotten_;
            num_forgotten_ = 0;
        }
    }

    int64_t num_nodes() const { return num_nodes_; }
    int64_t num_tokens() const { return static_cast<int64_t>(text_.size()) - num_forgotten_; }

    // Copies at most `limit` tokens after the growing text, or after other tokens if `size` >= 0, as `copy_from`.
    // Returns their number.
    int64_t copy(const int64_t* after, int64_t size, int64_t limit, double doubt, double least, int64_t* tokens,
                 double* reaches) {
        drafted_.clear();
        places_ = {of_index(ROOT)};
        if (size < 0)
            for (size_t i = 1; i < open_.size(); i++) places_.push_back(of_index(open_[i]));
        for (int64_t i = std::max<int64_t>(0, size - depth_ + 1); i < size; i++) extend_places(after[i]);
        double reach = 1;
        while (static_cast<int64_t>(drafted_.size()) < limit) {
            const auto [token, prob] = likeliest_of_places(doubt);
            reach *= prob;
            if (reach < least) break;
            extend_places(token);
            tokens[drafted_.size()] = token;
            reaches[drafted_.size()] = reach;
            drafted_.push_back(token);
        }
        return static_cast<int64_t>(drafted_.size());
    }

  private:
    static constexpr int64_t ROOT = 0;

    int64_t new_node() {
        if (free_.empty()) {
            nodes_.emplace_back();
            return static_cast<int64_t>(nodes_.size()) - 1;
        }
        const int64_t index = free_.back();
        free_.pop_back();
        nodes_[index] = Node();
        return index;
    }

    int64_t second(int64_t first, int64_t position, int64_t length) {
        num_nodes_++;
        const int64_t index = new_node(), next = text_[first + 1 - start_];
        Node& node = nodes_[index];
        node.count = 2;
        node.last = position;
        if (length < depth_ && next != SEPARATOR) {
            node.children.set(next, first + 1);
            node.total = 1;
            node.likeliest = next;
        }
        return index;
    }

    int64_t count_at(Place place) const { return is_node(place) ? nodes_[index_of(place)].count : 1; }
    int64_t count(Node& node, int64_t token) const {
        const Place* child = node.children.find(token);
        return child ? count_at(*child) : 0;
    }

    void uncount(int64_t position) {
        int64_t parent = ROOT;
        const int64_t first = position - start_, end = std::min<int64_t>(first + depth_, text_.size());
        for (int64_t i = first; i < end; i++) {
            const int64_t token = text_[i];
            if (token == SEPARATOR) return;
            Node& node = nodes_[parent];
            const Place child = *node.children.find(token);
            node.total--;
            if (node.likeliest == token) node.likeliest = NONE;
            if (!is_node(child)) {
                node.children.erase(token);
                return;
            }
            Node& longer = nodes_[index_of(child)];
            if (--longer.count == 1) {
                node.children.set(token, longer.last);
                remove_chain(index_of(child));
                return;
            }
            parent = index_of(child);
        }
    }

    // The nodes from one with two occurrences downward: each has two occurrences and one child.
    void remove_chain(int64_t index) {
        while (index != NONE) {
            int64_t next = NONE;
            for (const auto& [token, place] : nodes_[index].children.entries())
                if (is_node(place)) next = index_of(place);
            nodes_[index] = Node();
            free_.push_back(index);
            num_nodes_--;
            index = next;
        }
    }

    // The token at a position, which may be in the draft.
    int64_t token_at(int64_t position) const {
        const int64_t index = position - start_, size = static_cast<int64_t>(text_.size());
        const int64_t within = index - size, num_drafted = static_cast<int64_t>(drafted_.size());
        const int64_t token = index < size ? text_[index] : within < num_drafted ? drafted_[within] : NONE;
        return token == SEPARATOR ? NONE : token;
    }

    void extend_places(int64_t token) {
        longer_ = {of_index(ROOT)};
        const size_t end = std::min<size_t>(places_.size(), depth_ - 1);
        for (size_t i = 0; i < end; i++) {
            if (is_node(places_[i])) {
                if (const Place* child = nodes_[index_of(places_[i])].children.find(token)) longer_.push_back(*child);
            } else if (token_at(places_[i] + 1) == token) {
                longer_.push_back(places_[i] + 1);
            }
        }
        places_.swap(longer_);
    }

    int64_t likeliest(Node& node) {
        if (node.likeliest == NONE && node.total) {
            std::pair<int64_t, int64_t> most{-1, -1};
            for (const auto& [token, child] : node.children.entries()) {
                const int64_t last = is_node(child) ? nodes_[index_of(child)].last : child;
                const std::pair<int64_t, int64_t> rank{count_at(child), last};
                if (rank > most) most = rank, node.likeliest = token;
            }
        }
        return node.likeliest;
    }

    // The most probable of the places' likeliest tokens, without the empty context, and its probability.
    std::pair<int64_t, double> likeliest_of_places(double doubt) {
        candidates_.clear();
        for (size_t i = 1; i < places_.size(); i++)
            candidates_.push_back(is_node(places_[i]) ? likeliest(nodes_[index_of(places_[i])])
                                                      : token_at(places_[i] + 1));
        int64_t best = 0;
        double most = 0;
        for (auto at = candidates_.rbegin(); at != candidates_.rend(); ++at) {
            if (*at == NONE || std::find(candidates_.rbegin(), at, *at) != at) continue;
            const double prob = probability(*at, doubt);
            if (prob > most) most = prob, best = *at;
        }
        return {best, most};
    }

    double probability(int64_t token, double doubt) {
        double prob = 0;
        for (size_t i = 1; i < places_.size(); i++) {
            int64_t times, total;
            if (is_node(places_[i])) {
                Node& node = nodes_[index_of(places_[i])];
                times = count(node, token);
                total = node.total;
            } else {  // its candidate is the one token after it
                times = candidates_[i - 1] == token;
                total = candidates_[i - 1] != NONE;
            }
            prob = (static_cast<double>(times) + doubt * prob) / (static_cast<double>(total) + doubt);
        }
        return prob;
    }

    int64_t depth_, start_ = 0, num_forgotten_ = 0, begin_ = 0, num_nodes_ = 0;
    std::vector<Node> nodes_;
    std::vector<int64_t> free_, open_{ROOT}, text_;
    std::vector<int64_t> drafted_, candidates_;  // of the current copy
    std::vector<Place> places_, longer_;
    std::deque<int64_t> lengths_;
};

}  // namespace

extern "C" {

void* suffix_tree_new(int64_t depth) { return new Tree(depth); }
void suffix_tree_delete(void* tree) { delete static_cast<Tree*>(tree); }

void suffix_tree_extend(void* tree, const int64_t* tokens, int64_t size) {
    for (int64_t i = 0; i < size; i++) static_cast<Tree*>(tree)->append(tokens[i]);
}
void suffix_tree_complete(void* tree) { static_cast<Tree*>(tree)->complete(); }
void suffix_tree_forget_oldest(void* tree) { static_cast<Tree*>(tree)->forget_oldest(); }
int64_t suffix_tree_num_nodes(void* tree) { return static_cast<Tree*>(tree)->num_nodes(); }
int64_t suffix_tree_num_tokens(void* tree) { return static_cast<Tree*>(tree)->num_tokens(); }

int64_t suffix_tree_copy(void* tree, const int64_t* after, int64_t size, int64_t limit, double doubt, double least,
                         int64_t* tokens, double* reaches) {
    return static_cast<Tree*>(tree)->copy(after, size, limit, doubt, least, tokens, reaches);
}
}
